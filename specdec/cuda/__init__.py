"""What only a GPU needs: recorded passes, and verdicts that are made on the device."""
