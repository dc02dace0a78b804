'use strict'
// The table of runs, made to move: sorted by its heads, filtered by words, and two or more ticked runs compared.
// Whatever a run says is set as text; nothing is asked for, and nothing is kept.
const WORDS = {c: 'correct', w: 'wrong', u: 'unscored', t: 'truncated'}
const SHOWN = 100
const table = document.getElementById('runs')
const rows = [...table.tBodies[0].rows]
const compared = document.getElementById('compared')

function make(tag, content = [], attributes = {}) {
  const element = document.createElement(tag)
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value)
  element.append(...[content].flat())
  return element
}

function tableOf(label, head, lines) {
  const cells = line => [make('th', line[0], {scope: 'row'}), ...line.slice(1).map(cell => make('td', cell))]
  const made = make('table', [
    make('thead', make('tr', head.map(name => make('th', name, {scope: 'col'})))),
    make('tbody', lines.map(line => make('tr', cells(line)))),
  ])
  return make('div', made, {class: 'scroll compared', role: 'group', 'aria-label': label, tabindex: '0'})
}

// ---- sorted ----

const keyOf = (row, place) => row.cells[place].dataset.key ?? row.cells[place].textContent.trim()

function sort(head) {
  const place = head.cellIndex
  const down = head.getAttribute('aria-sort') === 'ascending'
  for (const other of table.tHead.rows[0].cells) other.removeAttribute('aria-sort')
  head.setAttribute('aria-sort', down ? 'descending' : 'ascending')
  const order = (one, other) => {
    const [there, here] = [keyOf(one, place), keyOf(other, place)]
    if (!there || !here) return !there - !here // what a run does not have comes last, either way
    const sign = isNaN(there) || isNaN(here) ? there.localeCompare(here, 'en', {numeric: true}) : there - here
    return down ? -sign : sign
  }
  table.tBodies[0].append(...[...rows].sort(order))
}

// ---- filtered ----

function filter() {
  const words = document.getElementById('filter').value.toLowerCase().split(/\s+/)
  for (const row of rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word))
  const left = rows.filter(row => !row.hidden).length
  document.getElementById('count').textContent = `${left} of ${rows.length} shown`
}

// ---- compared ----

const nameOf = row => row.dataset.run
const quoted = name => /^\w[\w.-]*$/.test(name) ? name : `'${name.replaceAll("'", "'\\''")}'`

function differences(chosen) {
  const facts = chosen.map(row => JSON.parse(row.dataset.facts))
  const keys = [...new Set(facts.flatMap(Object.keys))]
  const lines = keys.map(key => [key, ...facts.map(one => one[key] ?? '')])
    .filter(([, ...values]) => new Set(values).size > 1)
  const heading = make('h3', 'What is different')
  if (!lines.length) return [heading, make('p', 'Nothing in their configurations, code, data and machines.')]
  return [heading, tableOf('What is different', ['entry', ...chosen.map(nameOf)], lines)]
}

function metrics(chosen) {
  const lines = chosen.map(row => {
    const cell = row.querySelector('.result')
    return [nameOf(row), [...cell.cloneNode(true).childNodes], row.querySelector('.said').textContent]
  })
  return [make('h3', 'Accuracy on one axis'), tableOf('Accuracy', ['run', '0 % to 100 %', 'its verdict'], lines)]
}

function items(chosen) {
  const heading = make('h3', 'Items that came out differently')
  const {asked, marks} = chosen[0].dataset
  if (chosen.some(row => !row.dataset.marks))
    return [heading, make('p', 'Not all of them have answers that can be held against each other here.')]
  if (chosen.some(row => row.dataset.asked !== asked || row.dataset.marks.length !== marks.length))
    return [heading, make('p', 'They were asked different questions, so no item can be compared.')]
  const questions = JSON.parse(table.dataset.items)[asked].slice(0, marks.length) // a part is the head of the set
  const lines = questions.map(([id, text], place) => [id, text, ...chosen.map(row => row.dataset.marks[place])])
  const right = line => line.slice(2).filter(mark => mark === 'c').length
  const apart = lines.filter(line => right(line) > 0 && right(line) < chosen.length)
  const alone = chosen.map((row, place) =>
    `${apart.filter(line => right(line) === 1 && line[place + 2] === 'c').length} only in ${nameOf(row)}`)
  const counts = `Of ${lines.length} items ${lines.filter(line => right(line) === chosen.length).length} are correct ` +
    `in all of them, ${lines.filter(line => !right(line)).length} in none; ${alone.join(', ')}. ` +
    'Whether that is more than chance, the whole comparison says.'
  const shown = apart.slice(0, SHOWN).map(([id, text, ...found]) => [id, text, ...found.map(mark => WORDS[mark])])
  const rest = apart.length - shown.length
  return [
    heading, make('p', counts),
    ...apart.length ? [tableOf('Items', ['item', 'question', ...chosen.map(nameOf)], shown)] : [],
    ...rest ? [make('p', `And ${rest} more.`, {class: 'note'})] : [],
  ]
}

function whole(chosen) {
  const [first, ...others] = chosen.map(row => quoted(nameOf(row)))
  return [
    make('h3', 'The whole comparison, with every answer and a verdict'),
    make('pre', others.map(other => `${table.dataset.compare} ${first} ${other} --output compared_${other}.html`).join('\n')),
  ]
}

let due = 0
function soon() { // many ticks at once are one comparison
  clearTimeout(due)
  due = setTimeout(compare)
}

function compare() {
  const chosen = rows.filter(row => row.querySelector('input').checked)
    .sort((one, other) => nameOf(one).localeCompare(nameOf(other)))
  compared.hidden = chosen.length < 2
  if (compared.hidden) return compared.replaceChildren()
  compared.replaceChildren(
    make('h2', `${chosen.length} runs compared`),
    ...differences(chosen), ...metrics(chosen), ...items(chosen), ...whole(chosen))
}

// ---- what a reader uses ----

for (const head of table.tHead.rows[0].cells) {
  const button = make('button', [...head.childNodes], {type: 'button'})
  button.addEventListener('click', () => sort(head))
  head.append(button)
}
table.tHead.rows[0].prepend(make('td', 'compare'))
for (const row of rows) {
  const tick = make('input', [], {type: 'checkbox', 'aria-label': `compare ${nameOf(row)}`})
  tick.addEventListener('change', soon)
  row.prepend(make('td', tick))
}
document.getElementById('filter').addEventListener('input', filter)
document.getElementById('tools').hidden = false
filter()
