"""Draw figures of results. The module `kinds` defines what each kind of figure shows, and `figures` draws all kinds."""
