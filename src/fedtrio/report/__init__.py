"""What a run says to a reader: the table in the terminal, the page `report.html`. Imports no torch."""
