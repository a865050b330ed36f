"""The model families behind one protocol: found, checked, loaded, and run.

`base` is the protocol, `registry` the only module that imports a family; it finds a checkpoint and hands it to the
family that its `model_type` names. `checkpoint` reads what is the same for all: folder, config.json, safetensors
headers, fingerprint. `hub` finds a model in a cache or downloads it. `phi4mm` is the family of Phi-4-multimodal.

To add a family, write a folder beside `phi4mm` with all that the two protocols of `base` name:

1. a `ModelFamily` in its `__init__.py`, which imports nothing slow: names, default model, prefix of the part files;
   `inspect` returns a `Checkpoint` (or a subclass that holds what loading needs) and refuses what does not fit;
2. a `VisionLanguageModel`, which `load` returns. `spec` tells the engine the stored layers and the groups of layers
   that share keys and values. `prefill_image` writes a picture's keys into blocks of the cache, once; `forward` reads
   further tokens of many rows, each over its picture's blocks and its own slot: see `layers.attention`;
3. `write_random_checkpoint`, by which the demo and the tests run without the real weights;
4. a `Reference`, for `--self-check`: the model's library, used as it is; `describe_reference` refuses where there is
   none;

and add it to `registry.FAMILIES`. `tests/helpers/stand_in_family.py` is a whole family in about a hundred lines,
`tests/system/test_stand_in_family.py` what it has to pass: every row as in a reference that shares no code.
"""
