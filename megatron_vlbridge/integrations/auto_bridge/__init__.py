"""An `AutoBridge` with the names of Megatron-Bridge, for the models of this project; it does not import that."""
