-- Read all that is known of one job.
-- needs: numbers envelope kept_result ended_mark leased shut_tasks job_place
--
-- KEYS  1 jobs  2 state  3 due  4 dead  5 workers  6 result:<id>  7 results:<window>
-- ARGV  1 id
-- returns {place, envelope or "", state or "", extra}    place: ready waiting (in a group, or for another job) scheduled leased
--         dead result ended cancelled none
--         ended: well, and no record is kept · cancelled: a stub without a record · none: not known, or no longer
--         extra: due or death in ms, the job that it waits for, the worker that holds it, the record of its outcome, the mark of an
--         end (lib/ended.lua),
--         or "1" for an own id that was here within a day
--         and of a leased job: since when (ms, or ""), and what its worker said of itself
return job_place({
  prefix = string.sub(KEYS[1], 1, -5), jobs = KEYS[1], state = KEYS[2], due = KEYS[3], dead = KEYS[4], workers = KEYS[5],
}, ARGV[1], KEYS[6], KEYS[7])
