"""What happens before Megatron's pretraining: the command line, its checks, and where the weights come from."""
