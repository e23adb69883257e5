-- List what a worker holds. A worker asks when its own count differs.
-- needs: leased
--
-- KEYS  1 leased:<worker>
-- ARGV  none
-- returns ids
return ids_held(KEYS[1])
