"""The contracts of the methods, one file each; the file name is the registered name."""
