if __name__ != "deltaloom.backends":
    raise ImportError("import deltaloom.backends, not backends: this folder is the source of deltaloom.backends")
