"""The single checks of `fedtrio doctor`: each yields what it found, or raises what a command would end with."""
