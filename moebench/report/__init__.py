"""How results and verdicts are shown: tables, plots, pages, JUnit and GitHub. No torch."""
