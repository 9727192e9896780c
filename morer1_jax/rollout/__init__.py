"""Group sampling and its rewards, in one compiled program."""
