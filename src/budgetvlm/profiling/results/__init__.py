"""The result files of the sweeps: names, fields, reading and writing."""
