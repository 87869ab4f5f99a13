"""Play a trial: draw its tensors, take its steps with a layer, compare, and write it as lines of Python."""
