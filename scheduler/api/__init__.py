"""What the scheduler serves: sandboxes and content to tenants and operators, hosts to operators. Every call checks whose it is."""
