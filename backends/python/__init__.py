"""tautomer.backends.python: a program as Python that a person reads; ``to_python`` puts the parts together.

Reading order: a file imports only files above it.

    pieces.py        Python text in pieces: an expression whose variables and numbers are still open
    ops.py           Every call of a graph as a person would write it
    torch_layers.py  Which calls of a graph are a layer of torch.nn with its own weights
    statements.py    What a function of a written module is made of: statements, loops, inputs and results
    loops.py         Calls of numbered modules in a row as one loop
    nesting.py       A flat graph as nested calls of modules, as the user's module tree made them
    function.py      A call of a module as the statements of its forward
    names.py         Names for the values of a function: by what reads them, by what made them
    classes.py       The modules of a program as classes: equal ones are one class, numbers that differ are arguments
    called.py        How the written model is called: the user's names, dicts and tuples
    text.py          The text of the written module: imports, semantic ops, classes, how it is loaded
    check.py         Import a written package in a fresh process that has no tautomer, and hold it to the emitted module

``block_text`` writes the forward of one block with pieces, ops, names and attributes.
"""
