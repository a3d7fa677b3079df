"""How `Anatomy.of` finds the pieces of a network: what the libraries say first, the module tree for the rest."""
