"""What runs a reader's graphs: `base` has the interfaces, `load` picks an implementation by the manifest."""
