"""Updates by formula: each rule takes the places of a parameter that it knows, and declines others with a reason."""
