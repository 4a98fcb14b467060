"""How large a step's trees may be: a fixed size, or what this machine and the drafts make worthwhile."""
