"""python -m moebench"""

from moebench.cli import main

main()
