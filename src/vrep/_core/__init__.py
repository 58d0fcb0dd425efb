"""Native concepts, one thin module each; see the header of the same name for the contract."""
