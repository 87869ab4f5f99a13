# Measures and judges with the installed moebench. action.yml sets the variables from the inputs of the same names.
set -uo pipefail

for pair in "against:$AGAINST:revision:baseline" "undecided:$UNDECIDED:pass:fail"; do
  IFS=: read -r name value one other <<< "$pair"
  if [[ $value != "$one" && $value != "$other" ]]; then
    echo "$name: $value: it must be $one or $other" >&2
    exit 2
  fi
done

arguments=()
while IFS= read -r line; do
  if [[ -n $line ]]; then arguments+=("$line"); fi
done <<< "$ARGUMENTS"

judge=(--threshold "$THRESHOLD" --github --junit "$JUNIT")
if [[ $AGAINST == revision ]]; then
  moebench ab "$BASE" HEAD "$SWEEP" --out "$RESULTS" "${judge[@]}" "${arguments[@]}"
else
  moebench run "$SWEEP" --out "$RESULTS" "${arguments[@]}" && moebench gate auto "$RESULTS" "${judge[@]}"
fi
code=$?
if [[ $code == 3 && $UNDECIDED == pass ]]; then exit 0; fi  # the pull request gets warnings and does not fail
exit "$code"
