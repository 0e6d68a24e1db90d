"""`dmtg regroup`: a challenger every night, and its promotion when it is better than the champion."""
