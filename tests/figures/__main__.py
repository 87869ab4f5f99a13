"""Write the tables in documents from the committed results: `python -m tests.figures`. `make results` calls it."""

from tests.figures.data import ROOT
from tests.figures.tables import TABLES, written

if __name__ == "__main__":
    for (document, name), table in TABLES.items():
        path = ROOT / document
        path.write_text(written(path.read_text(), name, table()))
        print(f"wrote table {name} in {path}")
