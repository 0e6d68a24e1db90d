"""HTML pages: rendering, figures and pictures, the report of a run and the page of a data set."""
