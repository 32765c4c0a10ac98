"""The command-line programs other than training and evaluation."""
