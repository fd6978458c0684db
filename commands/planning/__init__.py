"""Plan a layout, compare machines, and calibrate the machine at hand."""
