"""A hyper-parameter search as files say it: what is searched, which values a trial gets, what was found. No Ray."""
