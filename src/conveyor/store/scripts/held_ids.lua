-- List what a worker holds. A worker asks when its own count differs.
-- needs: leased_order
--
-- KEYS  1 leased:<worker>
-- ARGV  none
-- returns ids, the oldest first
return (ids_in_order(KEYS[1]))
