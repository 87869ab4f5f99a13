"""python -m moebench"""

from moebench.cli.app import main

main()
