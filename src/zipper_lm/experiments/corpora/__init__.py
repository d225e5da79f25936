"""Small aligned data sets that are made on the spot, for experiments: nothing is downloaded."""
