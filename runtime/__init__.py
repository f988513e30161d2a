if __name__ != "deltaloom.runtime":
    raise ImportError("import deltaloom.runtime, not runtime: this folder is the source of deltaloom.runtime")
