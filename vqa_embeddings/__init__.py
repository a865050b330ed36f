"""Hidden-state vectors and answers of Phi-4-multimodal for every row of a VQA table.

The data flows one way: rows (`table`) -> shares (`plan`) -> pictures (`images`) -> states (`phi4`, `extract`)
-> segments (`shards`) -> parts (`parts`, `merge`). Nothing upstream imports what is downstream of it, but for the
start of a launch (`launch`), which looks at what the output folder holds already (`holdings`).
"""

__version__ = "0.1.0"
