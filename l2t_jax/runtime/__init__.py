"""The machine: devices, programs, processes, files. Knows no network."""
