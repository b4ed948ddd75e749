"""What quantised weights and skipped neurons cost and save together, simulated in eager PyTorch."""
