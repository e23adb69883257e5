-- Lists that are kept as text.

-- Search a list for an item.
-- text       the items, with the separator between them
-- separator  one character that no item holds
-- item       the item to search for
-- returns    its position, nil when it is not in the list
local function listed(text, separator, item)
  return string.find(separator .. text .. separator, separator .. item .. separator, 1, true)
end
