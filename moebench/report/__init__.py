"""Show results and verdicts as tables, plots, HTML pages, JUnit files and GitHub annotations."""
