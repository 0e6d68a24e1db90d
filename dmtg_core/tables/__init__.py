"""Tables: cells, dates, figures of columns, and the conversion of rows to features."""
