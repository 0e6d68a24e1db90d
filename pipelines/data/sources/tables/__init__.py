"""Tables in files of any dialect: compression, encoding, delimiter, decimal mark; errors with line and column."""

import csv

MOST_CELL = 2**28  # characters of a cell; Python's own limit of 131,072 is less than a long text
csv.field_size_limit(max(csv.field_size_limit(), MOST_CELL))
