if __name__ != "deltaloom.testing":
    raise ImportError("import deltaloom.testing, not testing: this folder is the source of deltaloom.testing")
