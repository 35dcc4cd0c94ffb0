def install_when_inductor_is_imported():
    pass
