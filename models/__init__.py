if __name__ != "deltaloom.models":
    raise ImportError("import deltaloom.models, not models: this folder is the source of deltaloom.models")
