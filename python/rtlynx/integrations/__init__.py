"""Where rtlynx plugs into other libraries' own ways of loading a model."""
