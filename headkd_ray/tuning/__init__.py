"""Hyper-parameter search: the search file, the values of each trial, the records and their analysis. Only on_ray needs Ray."""
