if __name__ != "deltaloom.cli":
    raise ImportError("import deltaloom.cli, not cli: this folder is the source of deltaloom.cli")
