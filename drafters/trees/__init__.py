"""How draft trees grow, what shape they have, and how several become one."""
