"""How channels flow through each family of operators, one file per family."""
