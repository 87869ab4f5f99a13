"""What shows results and verdicts: tables, plots, HTML pages, JUnit files and GitHub annotations."""
