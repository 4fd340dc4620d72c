"""What every door and every implementation shares: contracts, types, layouts, settings, backends."""
