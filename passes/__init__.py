"""Graph -> Graph: the passes, the kernels' protocol, the emitter and the compile driver."""

if __name__ != "deltaloom.passes":
    raise ImportError("import deltaloom.passes, not passes: this folder is the source of deltaloom.passes")
