"""`dmtg regroup`: nightly runs that train a challenger and promote it if it is better than the champion."""
