if __name__ != "deltaloom.graph":
    raise ImportError("import deltaloom.graph, not graph: this folder is the source of deltaloom.graph")
